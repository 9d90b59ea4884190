"""How factors are stored: numbers, dictionaries, codes on a support, and sums of such products.

Codecs of numbers and supports themselves travel inside every checkpoint: they are in `cospadi.runtime`, where
`cospadi_registry` has a line for each.
"""
