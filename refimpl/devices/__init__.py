"""Where modules run and weights lie: the backends, placement rules, and what fits into which memory."""
