package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const defaultNodeWait = 30 * time.Second

// waitItem is what node wait prints.
type waitItem struct {
	Revision int64 `json:"revision"` // of the registry, that all of them have acknowledged
	Agents   int32 `json:"agents"`   // connected to this server
}

func (a *app) nodeWait() *cobra.Command {
	wait := duration{config.Duration(defaultNodeWait)}
	cmd := &cobra.Command{
		Use:   "wait",
		Short: "wait until every connected agent has all changes",
		Long: "Wait returns once every agent that is connected to this server has acknowledged what the\n" +
			"server knows now: what was changed before is in force on their nodes. An agent that goes\n" +
			"away meanwhile is not waited for.",
		Example: "  hallmark entry create --spiffe-id /web --node join_token/4f1c --selector unix:user:web && hallmark node wait\n  hallmark node wait --timeout 2m -o json",
		Args:    noArguments,
	}
	cmd.Flags().Var(&wait, "timeout", "how `long` to wait for them")
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		seconds, err := wait.seconds("--timeout")
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Duration(seconds)*time.Second+callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().AwaitAgents(ctx, &hallmarkv1.AwaitAgentsRequest{Wait: seconds})
		if err != nil {
			return rpcError("wait for agents", err)
		}
		return a.print(waitItem{resp.Revision, resp.Agents}, func(w io.Writer) {
			fmt.Fprintf(w, "Revision %d has reached %s.\n", resp.Revision, count(int(resp.Agents), "connected agent", "connected agents"))
		})
	}
	return cmd
}
