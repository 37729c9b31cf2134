"""The values behind every choice; installed as sae_train.conf. Types and documentation: sae_train/config/."""
