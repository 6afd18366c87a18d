"""Bit budgets: which format each layer gets, so that the loss is least and the file not too large."""
