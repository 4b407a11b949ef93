"""The Hugging Face Hub, through huggingface_hub alone: its client, cache, tokens, retries and errors."""
