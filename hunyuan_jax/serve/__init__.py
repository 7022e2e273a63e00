"""An HTTP server with the OpenAI API on the engine of `infer/`."""
