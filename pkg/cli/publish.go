package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func (a *app) publishCommand() *cobra.Command {
	return noun("publish", "see where the server publishes what verifies SVIDs",
		"A target is a place that the server writes the bundle, or the documents of issuers of\n"+
			"JWT-SVIDs, to, for others to fetch (publish in its configuration).",
		"  hallmark publish list", a.publishList())
}

// targetItem is a target as it is printed.
type targetItem struct {
	Name           string     `json:"name"`
	Place          string     `json:"place"`
	Documents      []string   `json:"documents"` // paths in it
	State          string     `json:"state"`     // current, failing or pending
	SequenceNumber uint64     `json:"sequence_number,omitempty"`
	Newest         uint64     `json:"newest_sequence_number,omitempty"` // of the server's bundle
	PublishedAt    *time.Time `json:"published_at,omitempty"`           // when it was last seen to have all, since the server's start
	TriedAt        *time.Time `json:"tried_at,omitempty"`
	NextTry        *time.Time `json:"next_try,omitempty"`
	Failures       int        `json:"failures,omitempty"` // since it had all
	LastError      string     `json:"last_error,omitempty"`
}

func targetOf(t *hallmarkv1.PublishTarget) *targetItem {
	return &targetItem{
		Name: t.Name, Place: t.Place, Documents: t.Documents, State: t.State, SequenceNumber: t.SequenceNumber, Newest: t.NewestSequenceNumber,
		PublishedAt: timestamp(t.PublishedAt), TriedAt: timestamp(t.TriedAt), NextTry: timestamp(t.NextTry), Failures: int(t.Failures), LastError: t.Error,
	}
}

func (a *app) publishList() *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "list the targets, and how each is",
		Long: "List prints the targets of the server that is asked, with the sequence number of the\n" +
			"bundle that each has, when it was last seen to have the newest, and why it has not. Its\n" +
			"exit status is 0 also if a target fails.",
		Example: "  hallmark publish list\n  hallmark publish list -o json",
		Args:    noArguments,
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		c, err := a.admin(ctx, *socket)
		if err != nil {
			return err
		}
		defer c.Close()
		resp, err := c.server().ListPublishTargets(ctx, &hallmarkv1.ListPublishTargetsRequest{})
		if err != nil {
			return rpcError("list the targets", err)
		}
		items := make([]*targetItem, len(resp.Targets))
		for i, t := range resp.Targets {
			items[i] = targetOf(t)
		}
		if len(items) == 0 && a.output == outputTable {
			a.remark("The server publishes nothing; set publish in its configuration.")
			return nil
		}
		return a.print(items, func(w io.Writer) {
			t := table{style: a.style, header: []string{"TARGET", "PLACE", "DOCUMENTS", "STATE", "SEQUENCE", "SEEN"}}
			for _, item := range items {
				state, paint := item.State, a.style.green
				if item.Failures > 0 {
					state, paint = fmt.Sprintf("%s, %s", state, count(item.Failures, "try", "tries")), a.style.red
				}
				sequence, seen := "unknown", "never"
				if item.SequenceNumber > 0 {
					sequence = fmt.Sprint(item.SequenceNumber)
				}
				if item.SequenceNumber < item.Newest {
					sequence += fmt.Sprintf(", newest %d", item.Newest)
				}
				if item.PublishedAt != nil {
					seen = a.relative(*item.PublishedAt)
				}
				t.add(painted(a.style.bold, item.Name), text(item.Place), text(fmt.Sprint(len(item.Documents))), painted(paint, state), text(sequence), text(seen))
			}
			io.WriteString(w, t.String())
			for _, item := range items {
				if item.LastError != "" {
					fmt.Fprintf(w, "\n%s: %s\n", a.style.bold(printable(item.Name)), printable(item.LastError))
				}
			}
		})
	}
	return cmd
}
