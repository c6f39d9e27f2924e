"""The parts of a chat that a person sees: how a question is typed, the commands that begin with a slash, how
an answer appears, and what is shown while one waits. `refimpl.chat` puts them together.
"""
