// Package schema holds the JSON Schemas (draft 2020-12) of the configuration of
// server and agent. "make generate" makes them from the types that the
// configuration is decoded into, and from the comments of those, which are not
// there at run time.
package schema

import _ "embed"

// Server is the JSON Schema of server.yaml.
//
//go:embed server.json
var Server []byte

// Agent is the JSON Schema of agent.yaml.
//
//go:embed agent.json
var Agent []byte
