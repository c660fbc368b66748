//! The trigger that makes a forgotten guard an error.

use pgrx::prelude::*;
use pgrx::trigger_support::{PgTriggerLevel, PgTriggerWhen};

use super::guard;
use crate::argument;
use crate::error::Error;
use crate::guc;

pub fn require_guard(trigger: &PgTrigger) -> Result<(), Error> {
    if !matches!(trigger.level(), PgTriggerLevel::Statement)
        || !matches!(trigger.when(), Ok(PgTriggerWhen::Before))
    {
        return Err(Error::TriggerProtocol(
            "lease_guard_trigger() must be fired BEFORE, for each STATEMENT",
        ));
    }
    let arguments = trigger.extra_args().map_err(|_| not_utf8())?;
    let (name, setting) = match arguments.as_slice() {
        [name] => (name, None),
        [name, setting] => (name, Some(setting)),
        other => {
            return Err(Error::invalid(
                "lease_guard_trigger() takes lease_name and, if wanted, setting_name",
                format!("{} arguments", other.len()),
                "1 or 2",
                CREATE_IT_AGAIN,
            ));
        }
    };
    let name = argument::name("lease_name", Some(name))?;
    if let Some(setting) = setting {
        argument::name("setting_name", Some(setting))?;
    }
    if guard::is_guarded(name) {
        return Ok(());
    }
    let unguarded = |actual: String| Error::LeaseLost {
        name: name.to_owned(),
        token: None,
        actual,
    };
    let Some(setting) = setting else {
        return Err(unguarded("none".into()));
    };
    match guc::custom(setting).unwrap_or_default().trim() {
        "" => Err(unguarded(format!(
            "none, and setting \"{setting}\" holds no token"
        ))),
        value => match value.parse() {
            Ok(token) => guard::guard(name, token),
            // The value is not shown: it was read with the rights of the extension's owner.
            Err(_) => Err(unguarded(format!(
                "none, and what setting \"{setting}\" holds is no token"
            ))),
        },
    }
}

const CREATE_IT_AGAIN: &str =
    "CREATE OR REPLACE TRIGGER … EXECUTE FUNCTION lockstep.lease_guard_trigger('lease', 'setting')";

fn not_utf8() -> Error {
    Error::invalid(
        "lease_name and setting_name must be UTF-8",
        "other bytes",
        "UTF-8",
        CREATE_IT_AGAIN,
    )
}
