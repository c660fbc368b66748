//! The events that a push is given: their JSON form, checked key by key before anything is locked.

use pgrx::Uuid;
use std::fmt::Display;

use super::unique::Operation;
use crate::argument;
use crate::error::Error;
use crate::jsonb::{Element, Jsonb, Value};
use crate::position::MAX_EVENTS_PER_PUSH;

pub struct NewEvent<'a> {
    pub aggregate_type: &'a str,
    pub aggregate_id: &'a str,
    pub event_type: &'a str,
    pub payload: Option<Jsonb<'a>>,
    pub metadata: Option<Jsonb<'a>>,
    pub expected_sequence: Option<i64>,
    pub event_id: Option<Uuid>,
    pub unique: Vec<Operation>,
}

/// The events of the array, in order.
pub fn parse(events: Jsonb<'_>) -> Result<Vec<NewEvent<'_>>, Error> {
    let events = match events.value() {
        Value::Array(events) => events,
        other => {
            return Err(Error::invalid(
                "events must be a JSON array of objects",
                other.kind(),
                "an array",
                "A single event is an array of one, or push_event.",
            ));
        }
    };
    match events.len() {
        0 => Err(Error::invalid(
            "events must not be an empty array",
            "0 events",
            "at least 1",
            "Where there is nothing to push, do not call.",
        )),
        given if given > MAX_EVENTS_PER_PUSH => Err(Error::TooManyEvents {
            given,
            limit: MAX_EVENTS_PER_PUSH,
        }),
        _ => events
            .iter()
            .enumerate()
            .map(|(index, (_, element))| parse_event(index, element))
            .collect(),
    }
}

fn parse_event(index: usize, element: Element<'_>) -> Result<NewEvent<'_>, Error> {
    let object = match element.value() {
        Value::Object(object) => object,
        other => {
            return Err(Error::invalid(
                format!("event {index} must be a JSON object"),
                other.kind(),
                "an object",
                AN_EVENT,
            ));
        }
    };
    let mut aggregate_type = None;
    let mut aggregate_id = None;
    let mut event_type = None;
    let mut event = NewEvent {
        aggregate_type: "",
        aggregate_id: "",
        event_type: "",
        payload: None,
        metadata: None,
        expected_sequence: None,
        event_id: None,
        unique: Vec::new(),
    };
    for (key, element) in object.iter() {
        let at = Key {
            index,
            key: key.unwrap_or_default(),
        };
        match at.key {
            "aggregate_type" => aggregate_type = Some(at.name(element)?),
            "aggregate_id" => aggregate_id = Some(at.name(element)?),
            "event_type" => event_type = Some(at.name(element)?),
            "payload" => event.payload = Some(element.to_jsonb()),
            "metadata" => event.metadata = Some(element.to_jsonb()),
            "expected_sequence" => event.expected_sequence = Some(at.sequence(element)?),
            "event_id" => event.event_id = Some(at.uuid(element)?),
            "unique" => event.unique = at.operations(element)?,
            _ => {
                return Err(at.invalid(
                    "is not a key of an event",
                    format!("\"{}\"", at.key),
                    "aggregate_type, aggregate_id, event_type, payload, metadata, expected_sequence, event_id or unique",
                    "What else is to be kept goes into payload or metadata.",
                ));
            }
        }
    }
    let required = |key, value: Option<_>| {
        value.ok_or_else(|| Key { index, key }.invalid("is missing", "none", "a string", AN_EVENT))
    };
    Ok(NewEvent {
        aggregate_type: required("aggregate_type", aggregate_type)?,
        aggregate_id: required("aggregate_id", aggregate_id)?,
        event_type: required("event_type", event_type)?,
        ..event
    })
}

pub fn not_below_zero(what: &str, value: i64) -> Result<i64, Error> {
    if value < 0 {
        return Err(Error::invalid(
            format!("{what} must not be negative: {value}"),
            value,
            "at least 0",
            "0 is before an aggregate's first event.",
        ));
    }
    Ok(value)
}

const AN_OPERATION: &str = r#"An operation is {"op": "add", "scope": "email", "value": "a@example.com"}, perhaps with "global": true; op may be "remove"."#;
const AN_EVENT: &str = r#"An event is {"aggregate_type": "order", "aggregate_id": "7", "event_type": "paid"}, and perhaps more keys."#;

/// Where a value stands, for the messages.
struct Key<'k> {
    index: usize,
    key: &'k str,
}

impl Key<'_> {
    fn invalid(
        &self,
        problem: &str,
        actual: impl Display,
        expected: &str,
        hint: &'static str,
    ) -> Error {
        Error::invalid(format!("{} {problem}", self.path()), actual, expected, hint)
    }

    fn path(&self) -> String {
        format!("event {}: key \"{}\"", self.index, self.key)
    }

    fn name<'a>(&self, element: Element<'a>) -> Result<&'a str, Error> {
        match element.value() {
            Value::String(name) => {
                argument::not_empty(&self.path(), name)?;
                Ok(name)
            }
            other => Err(self.invalid("must be a string", other.kind(), "a string", AN_EVENT)),
        }
    }

    fn sequence(&self, element: Element<'_>) -> Result<i64, Error> {
        let value = element.value();
        match &value {
            Value::Number(number) => number.parse().ok(),
            _ => None,
        }
        .ok_or_else(|| {
            self.invalid(
                "must be a whole number",
                value.kind(),
                "a whole number below 2^63",
                "Leave it out to expect nothing.",
            )
        })
        .and_then(|sequence| not_below_zero(&self.path(), sequence))
    }

    fn uuid(&self, element: Element<'_>) -> Result<Uuid, Error> {
        let value = element.value();
        match &value {
            Value::String(text) => uuid::Uuid::try_parse(text).ok(),
            _ => None,
        }
        .map(|uuid| Uuid::from_bytes(uuid.into_bytes()))
        .ok_or_else(|| {
            self.invalid(
                "must be a uuid",
                value.kind(),
                "a string with a uuid",
                "Leave it out if there is none.",
            )
        })
    }

    fn operations(&self, element: Element<'_>) -> Result<Vec<Operation>, Error> {
        let operations = match element.value() {
            Value::Array(operations) => operations,
            other => {
                return Err(self.invalid(
                    "must be an array of objects",
                    other.kind(),
                    "an array",
                    AN_OPERATION,
                ));
            }
        };
        let operation = |(index, (_, element)): (usize, (_, Element<'_>))| {
            let kind = element.value().kind();
            let invalid = |problem: &str| {
                let problem = format!("[{index}]: {problem}");
                self.invalid(
                    &problem,
                    kind,
                    "an object with op, scope and value",
                    AN_OPERATION,
                )
            };
            let Value::Object(_) = element.value() else {
                return Err(invalid("must be an object"));
            };
            // The place that serde names is one in this text, which the caller does not see.
            let operation: Operation =
                serde_json::from_str(&element.to_text()).map_err(|error| {
                    let text = error.to_string();
                    invalid(text.split(" at line ").next().unwrap_or(&text))
                })?;
            let path = format!("{} [{index}]", self.path());
            argument::not_empty(&format!("{path}: scope"), &operation.scope)?;
            argument::within_limit(&format!("{path}: value"), &operation.value)?;
            Ok(operation)
        };
        operations.iter().enumerate().map(operation).collect()
    }
}
