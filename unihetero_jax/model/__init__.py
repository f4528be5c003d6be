"""The model: Visual Encoder, Semantic Encoder, Shared Decoder, Generation Head. Start reading at `unihetero.py`."""
