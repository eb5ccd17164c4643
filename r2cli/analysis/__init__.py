"""Analysis of weights: ranges, outliers and losses at few bits, as tables, pictures and a page."""
