//! Whose rights: the caller's, and the extension owner's.
//!
//! A SECURITY DEFINER function cannot learn who called it: the current user is its owner, and the session user or the SET ROLE
//! user may be somebody else when it is called from a definer function of an application. What must know its caller (whose
//! projection this is, with whose rights a handler runs) is therefore SECURITY INVOKER without a SET clause; it reads the
//! caller at entry and wraps its own SQL in [`as_extension_owner`]. That pins search_path too: in a schema-qualified
//! statement the operators and the types of casts are still found by the caller's path, and an `=` of the caller's own making
//! would run with the owner's rights.

use pgrx::callconv::{Arg, ArgAbi};
use pgrx::datum::IntoDatum;
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, Returns, ReturnsError, SqlMapping, SqlTranslatable,
};
use std::ffi::{CStr, CString};

use crate::error::Error;
use crate::guc::Settings;

/// The role with whose rights the calling statement runs.
pub fn caller() -> pg_sys::Oid {
    // SAFETY: reads backend-local state.
    unsafe { pg_sys::GetUserId() }
}

pub fn role_name(role: pg_sys::Oid) -> Option<String> {
    // SAFETY: returns a palloc'd string, or null with noerr.
    unsafe {
        let name = pg_sys::GetUserNameFromId(role, true);
        (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

pub fn is_superuser(role: pg_sys::Oid) -> bool {
    // SAFETY: a look-up in the system cache.
    unsafe { pg_sys::superuser_arg(role) }
}

/// Whether the role may give something to another: as PostgreSQL asks of ALTER … OWNER TO.
pub fn may_give_to(role: pg_sys::Oid, owner: pg_sys::Oid) -> bool {
    // SAFETY: look-ups in the system caches.
    #[cfg(feature = "pg15")]
    unsafe {
        pg_sys::is_member_of_role(role, owner)
    }
    // SAFETY: as above; membership without the right to SET ROLE came with version 16.
    #[cfg(not(feature = "pg15"))]
    unsafe {
        pg_sys::member_can_set_role(role, owner)
    }
}

/// Whether the role may act for the one named: it is that role, a member of it or a superuser. For a role that is gone only
/// a superuser may.
pub fn may_act_for(role: pg_sys::Oid, owner: &str) -> bool {
    let Ok(owner) = CString::new(owner) else {
        return false;
    };
    // SAFETY: look-ups in the system caches.
    unsafe {
        let owner = pg_sys::get_role_oid(owner.as_ptr(), true);
        is_superuser(role)
            || (owner != pg_sys::InvalidOid && pg_sys::has_privs_of_role(role, owner))
    }
}

/// Runs what `body` does with SQL as the extension's owner, with search_path pinned as in the SECURITY DEFINER functions, and
/// restores both after it; on an error PostgreSQL's abort restores them.
pub fn as_extension_owner<T>(body: impl FnOnce() -> T) -> T {
    let _identity = Identity::extension_owner();
    let _search_path = Settings::set(&[(c"search_path", c"pg_catalog, lockstep, pg_temp")]);
    body()
}

/// The caller's identity, restored when dropped.
struct Identity {
    user: pg_sys::Oid,
    context: i32,
}

impl Identity {
    fn extension_owner() -> Self {
        let mut saved = Identity {
            user: pg_sys::InvalidOid,
            context: 0,
        };
        // SAFETY: saves the pair that drop restores. SECURITY_LOCAL_USERID_CHANGE forbids SET ROLE inside.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut saved.user, &mut saved.context);
            pg_sys::SetUserIdAndSecContext(
                extension_owner(),
                saved.context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
            );
        }
        saved
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // SAFETY: the pair that GetUserIdAndSecContext returned.
        unsafe { pg_sys::SetUserIdAndSecContext(self.user, self.context) };
    }
}

/// The owner of the event log, which CREATE EXTENSION made its creator.
fn extension_owner() -> pg_sys::Oid {
    // SAFETY: look-ups in the system caches; GETSTRUCT of a pg_class tuple is a FormData_pg_class.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"lockstep".as_ptr(), false);
        let events = pg_sys::get_relname_relid(c"events".as_ptr(), schema);
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::RELOID as i32,
            pg_sys::Datum::from(events),
        );
        if tuple.is_null() {
            Error::invalid(
                "extension \"lockstep\" is not installed in this database",
                "none",
                "table lockstep.events",
                "CREATE EXTENSION lockstep",
            )
            .raise();
        }
        let class = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>();
        let owner = (*class).relowner;
        pg_sys::ReleaseSysCache(tuple);
        owner
    }
}

macro_rules! registered_oid {
    ($(#[$doc:meta])* $name:ident, $sql:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name(pub pg_sys::Oid);

        // SAFETY: a reg* datum is an oid.
        unsafe impl<'fcx> ArgAbi<'fcx> for $name {
            unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
                // SAFETY: pgrx calls this for arguments that are not null.
                $name(unsafe { arg.unbox_arg_using_from_datum().unwrap_unchecked() })
            }
        }

        // SAFETY: the SQL type of that datum.
        unsafe impl SqlTranslatable for $name {
            fn argument_sql() -> Result<SqlMapping, ArgumentError> {
                Ok(SqlMapping::literal($sql))
            }

            fn return_sql() -> Result<Returns, ReturnsError> {
                Ok(Returns::One(SqlMapping::literal($sql)))
            }
        }
    };
}

registered_oid!(
    /// A `regrole` argument.
    Role,
    "regrole"
);
registered_oid!(
    /// A `regprocedure` argument; `-` is no function.
    Procedure,
    "regprocedure"
);

impl Procedure {
    pub fn is_none(self) -> bool {
        self.0 == pg_sys::InvalidOid
    }

    /// Whether it is there, can be called in a SELECT and returns one value.
    pub fn is_plain_function(self) -> bool {
        // SAFETY: look-ups in the system cache; get_func_name returns null for what is not there.
        unsafe {
            !pg_sys::get_func_name(self.0).is_null()
                && pg_sys::get_func_prokind(self.0) as u8 == pg_sys::PROKIND_FUNCTION
                && !pg_sys::get_func_retset(self.0)
                && pg_sys::get_func_variadictype(self.0) == pg_sys::InvalidOid
        }
    }

    /// Whether the current user may call it.
    pub fn is_executable(self) -> bool {
        // SAFETY: has_function_privilege(oid, text) returns NULL for a function that is gone.
        let executable: Option<bool> = unsafe {
            pgrx::direct_function_call(
                pg_sys::has_function_privilege_id,
                &[self.0.into_datum(), "EXECUTE".into_datum()],
            )
        };
        executable.unwrap_or(false)
    }

    /// Schema-qualified name and argument types, as `regprocedure` reads them under any search_path; quoted where they must be,
    /// whatever the caller has set.
    pub fn qualified_name(self) -> String {
        let _settings = Settings::set(&[(c"quote_all_identifiers", c"off")]);
        // SAFETY: returns a palloc'd string.
        unsafe {
            let name = pg_sys::format_procedure_qualified(self.0);
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    /// The function of that stored name, if the current user's catalog has it.
    pub fn from_qualified_name(name: &str) -> Option<Self> {
        // SAFETY: to_regprocedure(text) returns NULL for a function that is not there.
        let procedure: Option<pg_sys::Oid> =
            unsafe { pgrx::direct_function_call(pg_sys::to_regprocedure, &[name.into_datum()]) };
        procedure.map(Procedure)
    }

    /// The type of its one argument; None if it has another number of them.
    pub fn argument_type(self) -> Option<pg_sys::Oid> {
        let mut types: *mut pg_sys::Oid = std::ptr::null_mut();
        let mut count = 0;
        // SAFETY: get_func_signature raises for an unknown function and fills a palloc'd array of `count` oids.
        unsafe {
            pg_sys::get_func_signature(self.0, &mut types, &mut count);
            (count == 1).then(|| *types)
        }
    }
}
