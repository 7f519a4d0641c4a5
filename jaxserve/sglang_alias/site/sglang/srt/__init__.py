"""`sglang.srt`."""
