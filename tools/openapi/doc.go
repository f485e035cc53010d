// Package openapi pins the generator, and the dependencies of its code, with which the
// integration tests generate a client from the OpenAPI document of a mounted engine.
package openapi

import (
	_ "github.com/oapi-codegen/runtime" // imported by generated code
)
