"""What the scripts share: reading tensors in pieces, exact arithmetic, safe writing.

Nothing is imported here, so that a script can answer ``--help`` before torch is loaded.
"""
