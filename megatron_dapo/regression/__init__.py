"""A run against reference curves and figures: is what it does what DAPO is known to do?"""
