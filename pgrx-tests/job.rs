//! Jobs, inside one transaction.
