"""`sglang.srt.entrypoints`."""
