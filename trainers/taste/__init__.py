"""A person's taste: the folder of votes, the fit of a head to them, what to ask next. No torch at
import: the panel's server reads it too.
"""
