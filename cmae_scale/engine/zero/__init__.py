"""What is known of the insides of DeepSpeed: partitions, gradients, masters, and what is mended of them."""
