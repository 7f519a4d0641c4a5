"""Several replicas of a model behind one engine: who gets a request, and who goes on with it."""
