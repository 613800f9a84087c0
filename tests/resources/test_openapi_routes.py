"""The table of routes in the OpenAPI document: every status is described."""

from ovms_rest.resources.error_handlers import STATUSES
from ovms_rest.resources.openapi_routes import ROUTES, describe_components, describe_routes


def test_every_status_of_an_error_is_described():
    described = describe_components()["responses"]
    assert {str(status) for status in STATUSES.values()} - {"204"} <= set(described)


def test_every_operation_has_the_statuses_of_all_routes_and_its_own():
    for path, methods in describe_routes().items():
        for operation in methods.values():
            assert {"200", "400", "405", "500", "503"} <= set(operation["responses"])
            assert ("413" in operation["responses"]) == ("requestBody" in operation), path
    assert "412" in describe_routes()["/v1/config/reload"]["post"]["responses"]


def test_parameters_of_the_path_are_declared():
    operation = describe_routes()["/v2/models/{name}/versions/{version}/infer"]["post"]
    assert operation["parameters"] == [{"$ref": f"#/components/parameters/{name}"} for name in ("name", "version")]


def test_rows_are_unique():
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
