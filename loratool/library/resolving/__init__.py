"""From a user's word to an adapter, a base, a model or samples: catalogued names, paths and Hub ids."""
