//! A real gate between two network namespaces.
