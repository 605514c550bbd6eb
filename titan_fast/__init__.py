"""Pretraining of Llama 2 and Llama 3 at the speed of the hardware. Start at `train.py`."""
