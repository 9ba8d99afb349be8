"""Write chosen rows of a run in the formats of other tools, with their media."""
