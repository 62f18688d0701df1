package cli

import (
	"fmt"

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
