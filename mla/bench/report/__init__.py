"""Result files as one HTML page, or as pictures: with the libraries of the extra `report`."""
