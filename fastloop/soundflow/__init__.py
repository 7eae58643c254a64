"""SoundFlow: sounds with known truth -> token sequences with labels -> a trained model."""
