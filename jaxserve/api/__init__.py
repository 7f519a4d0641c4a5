"""From the public calls' arguments to requests, and from updates to what the calls return."""
