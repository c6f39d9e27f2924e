"""Pages for a browser, made of plain files: a block whose bits can be flipped, a pass that can be walked.
They fetch nothing and send nothing.
"""
