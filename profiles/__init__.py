"""Data only: JSON profiles of GPUs, links, hosts, models and sparsity, each number with its basis and source."""
