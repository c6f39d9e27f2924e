"""What tests the suite itself: planted faults, equivalent rewrites, other projects' kernels, and seeds for
false alarms.
"""
