package harness

import (
	"bytes"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/hallmark-id/hallmark/conf/schema"
)

// Schema compiles the JSON Schema of the configuration of "server" or "agent".
func Schema(t testing.TB, program string) *jsonschema.Schema {
	t.Helper()
	text := map[string][]byte{"server": schema.Server, "agent": schema.Agent}[program]
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	must(t, err)
	c := jsonschema.NewCompiler() // checks it against the draft's meta-schema
	must(t, c.AddResource(program+".json", doc))
	s, err := c.Compile(program + ".json")
	must(t, err)
	return s
}
