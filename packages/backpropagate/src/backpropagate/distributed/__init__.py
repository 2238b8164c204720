"""Training on several GPUs: which launcher started this process (`launchers`), and the secret its ranks share."""
