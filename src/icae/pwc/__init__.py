"""Triples made from any corpus, after PwC, "Prompt with Context" (ICAE, arXiv 2307.06945, section 3.1).

corpus -> passages -> teacher -> raw replies (kept as they come) -> filters -> train and test triples
"""
