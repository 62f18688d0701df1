package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "let the shell complete commands",
		Long: "Completion prints the code that makes a shell complete commands, flags, and the IDs\n" +
			"of entries and nodes.",
		Example: "  source <(hallmark completion bash)\n" +
			"  hallmark completion zsh > \"${fpath[1]}/_hallmark\"\n" +
			"  hallmark completion fish > ~/.config/fish/completions/hallmark.fish",
		Args:      arguments(1, 1, "bash, zsh or fish"),
		ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(a.out, true)
			case "zsh":
				return cmd.Root().GenZshCompletion(a.out)
			case "fish":
				return cmd.Root().GenFishCompletion(a.out, true)
			}
			return usageError(fmt.Errorf("there is no completion for %q; it is bash, zsh or fish", args[0]))
		},
	}
}

// completer is what cobra asks for the words that may follow.
type completer = func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective)

// Bounds of what completion asks a server, so that a shell stays quick.
const (
	completionTimeout = 700 * time.Millisecond
	completionItems   = 200
)

// completeFromServer completes with what the server knows, of which a word may
// have a tab and a description after it. It is silent if the server cannot be
// asked: an error would end up in the middle of what is being typed.
func (a *app) completeFromServer(cmd *cobra.Command, typed string, list func(context.Context, *admin) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	socket, _ := cmd.Flags().GetString(serverSocket.flag)
	c, err := a.admin(ctx, socket)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	all, err := list(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return slices.DeleteFunc(all, func(word string) bool { return !strings.HasPrefix(word, typed) }), cobra.ShellCompDirectiveNoFileComp
}
