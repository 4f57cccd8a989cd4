"""What `scripts/train_demo_model.py` is made of: the text, the training, the scores and the card."""
