// Package openapi pins what the integration tests make a client with, from the
// OpenAPI document of a mounted engine: the generator, and what its code needs.
package openapi

import (
	_ "github.com/oapi-codegen/runtime" // which generated code imports
)
