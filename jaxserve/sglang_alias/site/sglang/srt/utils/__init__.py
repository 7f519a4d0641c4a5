"""`sglang.srt.utils`."""
