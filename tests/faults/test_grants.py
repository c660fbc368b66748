"""The README's and the guides' GRANT recipes: what each gives its role, and that it gives nothing else, by trying everything."""

import pytest
from grants import DENIED, RECIPES, USAGE, Extension, has, run, try_all
from sessions import raises


@pytest.fixture
def extension(roles):
    return Extension(roles.admin)


def own_projections(roles, role):
    """Only a member of a projection's owner changes it."""
    roles.admin.execute("UPDATE lockstep.projections SET owner = %s", (role,))


def everything(extension):
    """The privileges that the attempts need, all of them."""
    return frozenset().union(*(attempt.needs for attempt in extension.attempts() if attempt.needs))


def test_every_attempt_that_a_recipe_could_allow_works_as_a_superuser(roles, extension):
    """Else a test below could take a mistake of its own for a refusal, or for what is allowed."""
    own_projections(roles, "postgres")
    attempts = [attempt for attempt in extension.attempts() if attempt.needs]
    assert try_all(roles.admin, everything(extension), attempts) == []


def test_the_recipes_name_what_there_is(extension):
    relations = {name.removeprefix("lockstep.") for name in extension.names("table", "view")}
    privileges = everything(extension)
    for recipes in RECIPES.values():
        for role in recipes.roles:
            for privilege in recipes.expected(role):
                kind, name, _ = privilege
                assert privilege in privileges or kind == "relation" and name in {"*", *relations}, privilege
    # Every function is in some recipe.
    granted = set().union(*(RECIPES["README.md"].expected(role) for role in RECIPES["README.md"].roles))
    assert {p for p in privileges if p[0] in ("function", "procedure")} <= granted


@pytest.mark.parametrize("page, role", [(page, role) for page, recipes in RECIPES.items() for role in recipes.roles])
def test_a_recipe_allows_what_it_says_and_nothing_else(roles, extension, page, role):
    recipes = RECIPES[page]
    name = recipes.create(roles)[role]
    own_projections(roles, name)
    attempts = extension.attempts()
    assert len(attempts) > 1000
    assert try_all(roles.connect(name), recipes.expected(role), attempts) == []
