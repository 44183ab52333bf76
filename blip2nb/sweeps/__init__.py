"""Sweeps: one notebook for many models, several at a time, on this machine or on a cluster, and a report over all."""
