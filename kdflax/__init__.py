"""kdflax: knowledge distillation and joint learning as pure JAX functions."""
