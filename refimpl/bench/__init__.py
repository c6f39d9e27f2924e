"""Speed and memory, measured side by side with peers and with the limit of this machine: `python -m
refimpl.bench`.
"""
