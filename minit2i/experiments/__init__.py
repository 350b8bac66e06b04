"""Everything that measures.  README.md beside this file holds the results, results/ their data."""
