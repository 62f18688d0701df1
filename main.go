// Command hallmark is a workload identity system in one binary: the server
// that issues identities, the agent that brings them to workloads, and the
// commands to run both.
package main

import (
	"os"

	"github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/bench"
	"github.com/hallmark-id/hallmark/pkg/cli"
	"github.com/hallmark-id/hallmark/server"
)

func main() {
	os.Exit(cli.Main(cli.Programs{
		RunServer:     server.Run,
		CheckServer:   server.Check,
		RestoreServer: server.Restore,
		ReencryptKeys: server.ReencryptKeys,
		MigrateServer: server.Migrate,
		RunAgent:      agent.Run,
		CheckAgent:    agent.Check,
		ServerLayout:  server.Layout,
		AgentLayout:   agent.Layout,
		BenchEntries:  bench.Entries,
		BenchAgents:   bench.Agents,
	}))
}
