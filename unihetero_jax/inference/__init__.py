"""Using a trained model: text generation with a cache, and free-running rollouts of visual embeddings."""
