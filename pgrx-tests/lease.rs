//! Leases as one session sees them.

#[pgrx::pg_schema]
mod tests {}
