"""`sglang.srt.sampling`."""
