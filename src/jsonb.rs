//! JSON carried, not parsed: a `jsonb` argument is walked where it lies, and what is only stored or returned stays a datum.
//! Numbers never pass through a float, so one of 30 digits comes out as it went in.

use pgrx::callconv::{Arg, ArgAbi};
use pgrx::datum::{FromDatum, IntoDatum};
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, Returns, ReturnsError, SqlMapping, SqlTranslatable,
};
use std::ffi::CStr;
use std::marker::PhantomData;

/// A whole `jsonb` value, detoasted, in memory that lives as long as the call.
#[derive(Clone, Copy)]
pub struct Jsonb<'a> {
    pointer: *mut pg_sys::Jsonb,
    _call: PhantomData<&'a ()>,
}

/// One value inside a [`Jsonb`].
pub enum Value<'a> {
    Null,
    Bool,
    /// As PostgreSQL prints it.
    Number(String),
    String(&'a str),
    /// A string that is not UTF-8, from a database of another encoding.
    NotUtf8,
    Array(Container<'a>),
    Object(Container<'a>),
}

impl Value<'_> {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Bool => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::NotUtf8 => "a string that is not UTF-8",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        }
    }
}

/// An array or an object; iterates over its elements, an object's with their keys.
#[derive(Clone, Copy)]
pub struct Container<'a> {
    container: *mut pg_sys::JsonbContainer,
    _call: PhantomData<&'a ()>,
}

/// An element where it lies.
#[derive(Clone, Copy)]
pub struct Element<'a> {
    value: pg_sys::JsonbValue,
    _call: PhantomData<&'a ()>,
}

impl<'a> Jsonb<'a> {
    pub fn value(self) -> Value<'a> {
        // SAFETY: the root of a detoasted jsonb; a scalar is stored as an array of one element, marked as such.
        unsafe {
            let container = Container {
                container: &raw mut (*self.pointer).root,
                _call: PhantomData,
            };
            let header = (*container.container).header;
            if header & pg_sys::JB_FOBJECT != 0 {
                Value::Object(container)
            } else if header & pg_sys::JB_FSCALAR != 0 {
                container
                    .iter()
                    .next()
                    .map_or(Value::Null, |(_, element)| element.value())
            } else {
                Value::Array(container)
            }
        }
    }
}

impl<'a> Container<'a> {
    pub fn len(self) -> usize {
        // SAFETY: every container begins with its header, whose low bits count its elements.
        unsafe { ((*self.container).header & pg_sys::JB_CMASK) as usize }
    }

    /// The elements in their order; with an object's, their keys.
    pub fn iter(self) -> impl Iterator<Item = (Option<&'a str>, Element<'a>)> {
        // SAFETY: the iterator and all that it points to live in the call's memory.
        let mut iterator = unsafe { pg_sys::JsonbIteratorInit(self.container) };
        let mut key = None;
        std::iter::from_fn(move || {
            loop {
                let mut value = pg_sys::JsonbValue::default();
                // SAFETY: as above; nested containers are not entered (skipNested), so they come as one binary value.
                let token = unsafe { pg_sys::JsonbIteratorNext(&mut iterator, &mut value, true) };
                let element = Element {
                    value,
                    _call: PhantomData,
                };
                match token {
                    pg_sys::JsonbIteratorToken::WJB_KEY => key = element.as_str(),
                    pg_sys::JsonbIteratorToken::WJB_VALUE
                    | pg_sys::JsonbIteratorToken::WJB_ELEM => return Some((key.take(), element)),
                    pg_sys::JsonbIteratorToken::WJB_DONE => return None,
                    _ => {}
                }
            }
        })
    }
}

impl<'a> Element<'a> {
    pub fn value(self) -> Value<'a> {
        // SAFETY: the union's member is the one that type_ names; a binary value points to a container.
        unsafe {
            match self.value.type_ {
                pg_sys::jbvType::jbvBool => Value::Bool,
                pg_sys::jbvType::jbvNumeric => Value::Number(numeric_text(self.value.val.numeric)),
                pg_sys::jbvType::jbvString => self.as_str().map_or(Value::NotUtf8, Value::String),
                pg_sys::jbvType::jbvBinary => {
                    let container = Container {
                        container: self.value.val.binary.data,
                        _call: PhantomData,
                    };
                    if (*container.container).header & pg_sys::JB_FOBJECT != 0 {
                        Value::Object(container)
                    } else {
                        Value::Array(container)
                    }
                }
                _ => Value::Null,
            }
        }
    }

    /// A `jsonb` of its own.
    pub fn to_jsonb(mut self) -> Jsonb<'a> {
        // SAFETY: copies the value into a new jsonb in the current memory context.
        let pointer = unsafe { pg_sys::JsonbValueToJsonb(&mut self.value) };
        Jsonb {
            pointer,
            _call: PhantomData,
        }
    }

    /// Its text, as `jsonb::text` gives it.
    pub fn to_text(self) -> String {
        let jsonb = self.to_jsonb();
        // SAFETY: JsonbToCString allocates a NUL-terminated string in the current memory context.
        unsafe {
            let root = &raw mut (*jsonb.pointer).root;
            let text = pg_sys::JsonbToCString(std::ptr::null_mut(), root, 0);
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }

    fn as_str(self) -> Option<&'a str> {
        if self.value.type_ != pg_sys::jbvType::jbvString {
            return None;
        }
        // SAFETY: a string value points to `len` bytes inside the jsonb. from_utf8 also guards databases of another encoding.
        unsafe {
            let string = self.value.val.string;
            std::str::from_utf8(std::slice::from_raw_parts(
                string.val.cast(),
                string.len as usize,
            ))
            .ok()
        }
    }
}

unsafe fn numeric_text(numeric: pg_sys::Numeric) -> String {
    // SAFETY: numeric_out takes one numeric datum and returns a NUL-terminated string.
    let text: Option<&CStr> = unsafe {
        pgrx::direct_function_call(pg_sys::numeric_out, &[Some(pg_sys::Datum::from(numeric))])
    };
    text.map(|text| text.to_string_lossy().into_owned())
        .unwrap_or_default()
}

impl FromDatum for Jsonb<'_> {
    unsafe fn from_polymorphic_datum(
        datum: pg_sys::Datum,
        is_null: bool,
        _typoid: pg_sys::Oid,
    ) -> Option<Self> {
        if is_null {
            return None;
        }
        // SAFETY: the caller vouches that the datum is a jsonb; detoasting copies it only if it must.
        let pointer = unsafe { pg_sys::pg_detoast_datum(datum.cast_mut_ptr()) };
        Some(Jsonb {
            pointer: pointer.cast(),
            _call: PhantomData,
        })
    }
}

impl IntoDatum for Jsonb<'_> {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        Some(pg_sys::Datum::from(self.pointer))
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
    }
}

// SAFETY: unboxes a jsonb argument, which SqlTranslatable declares as such.
unsafe impl<'fcx> ArgAbi<'fcx> for Jsonb<'fcx> {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: pgrx calls this for arguments that are not null.
        unsafe { arg.unbox_arg_using_from_datum().unwrap_unchecked() }
    }
}

// SAFETY: the SQL type of the datums above.
unsafe impl SqlTranslatable for Jsonb<'_> {
    fn argument_sql() -> Result<SqlMapping, ArgumentError> {
        Ok(SqlMapping::literal("jsonb"))
    }

    fn return_sql() -> Result<Returns, ReturnsError> {
        Ok(Returns::One(SqlMapping::literal("jsonb")))
    }
}
