// Command gen writes what is made from the code, so that it cannot say anything
// else than the code does: the reference pages in docs, and the JSON Schemas of
// the configuration in conf/schema. "make generate" runs it, in the root of the
// repository.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"

	"github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/server"
)

func main() {
	if len(os.Args) != 1 {
		fmt.Fprintln(os.Stderr, "usage: gen")
		os.Exit(2)
	}
	made, err := files(".")
	for path, text := range made {
		if err == nil {
			err = os.WriteFile(path, text, 0o644)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

// files returns all that is made, by path below the root of the repository.
func files(root string) (map[string][]byte, error) {
	out := make(map[string][]byte)
	var err error
	if out["docs/metrics.md"], err = metricsPage(); err != nil {
		return nil, err
	}
	out["docs/reference/cli.md"] = cliPage()
	out["docs/attestors/README.md"] = attestorsPage()
	docs := comments{root: root}
	for _, p := range []program{
		{"server", reflect.ValueOf(server.Defaults())},
		{"agent", reflect.ValueOf(agent.Defaults())},
	} {
		tree, err := docs.tree(p.defaults)
		if err != nil {
			return nil, fmt.Errorf("configuration of the %s: %w", p.name, err)
		}
		out[filepath.Join("docs", "reference", p.name+"-config.md")] = configPage(p.name, tree)
		if out[filepath.Join("conf", "schema", p.name+".json")], err = schema(p.name, tree); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// program is one that has a configuration.
type program struct {
	name     string
	defaults reflect.Value // a struct
}
