//! What the in-backend tests share.
#![allow(clippy::panic)] // a test's way to fail

use pgrx::prelude::*;

/// An error as a client sees it.
#[derive(Debug, Default, PartialEq)]
pub struct Raised {
    pub sqlstate: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
    pub constraint: String,
}

/// Runs a statement inside a PL/pgSQL exception block and returns what it raised; empty if it raised nothing.
pub fn raised(statement: &str) -> Raised {
    if one("SELECT to_regproc('pg_temp.raised') IS NULL") {
        create_raised();
    }
    let quoted = statement.replace('\'', "''");
    let fields: Vec<String> = one(&format!("SELECT pg_temp.raised('{quoted}')"));
    let mut fields = fields.into_iter();
    let mut field = || fields.next().unwrap_or_default();
    Raised {
        sqlstate: field(),
        message: field(),
        detail: field(),
        hint: field(),
        constraint: field(),
    }
}

fn create_raised() {
    run(
        "CREATE FUNCTION pg_temp.raised(statement text) RETURNS text[] LANGUAGE plpgsql AS $$
         DECLARE
             message text;
             detail text;
             hint text;
             name text;
         BEGIN
             EXECUTE statement;
             RETURN '{}';
         EXCEPTION WHEN OTHERS THEN
             GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
                                     hint = PG_EXCEPTION_HINT, name = CONSTRAINT_NAME;
             RETURN ARRAY[SQLSTATE, message, detail, hint, name];
         END $$",
    );
}

pub fn sqlstate(statement: &str) -> String {
    raised(statement).sqlstate
}

pub fn run(statement: &str) {
    Spi::run(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
}

/// The one value of the one row.
pub fn one<T: FromDatum + IntoDatum>(query: &str) -> T {
    Spi::get_one(query)
        .unwrap_or_else(|error| panic!("{query}: {error}"))
        .unwrap_or_else(|| panic!("{query}: null"))
}

/// The column of the rows, joined by commas.
pub fn list(query: &str) -> String {
    one(&format!(
        "SELECT COALESCE(string_agg(r.v::text, ',' ORDER BY r.n), '')
         FROM (SELECT q.v, row_number() OVER () AS n FROM ({query}) AS q (v)) AS r"
    ))
}
