import sys, warnings; warnings.filterwarnings("ignore"); sys.path[:0]=["/tmp/p/w10/tests"]
import test_exercises as T
from labkit.exercises.exercise import exercises_of
for e in exercises_of("10_lab_deployment"):
    T.test_rounding_costs_a_right_answer_no_point_under_any_of_many_secrets(e)
    T.test_sentences_fit_every_case_differ_and_end_with_a_full_stop(e)
    T.test_half_an_answer_is_not_attempted(e)
    for c in T.CHANGES:
        for only in (0,1): T.test_no_sentence_tells_a_hidden_answer(e,c,only)
    for s in e.misconceptions:
        T.test_no_sentence_of_a_known_mistake_tells_a_hidden_answer(e,s); T.test_each_known_mistake_is_named_by_its_own_sentence(e,s)
        T.test_each_known_mistake_answers_every_public_case(e,s); T.test_each_known_mistake_fails_on_the_hidden_cases_of_any_secret(e,s)
    for f in T.almost_right(e): T.test_an_answer_that_is_wrong_on_unusual_inputs_fails_on_the_hidden_cases_of_any_secret(e,f)
    T.test_what_the_student_changes_in_place_reaches_no_case(e); T.test_a_secret_has_the_same_cases_every_time_and_another_secret_has_others(e)
    T.test_hidden_cases_are_those_that_students_see_with_other_values_and_more(e); T.test_an_exercise_says_what_it_is(e)
    for s in T.SECRETS:
        for c in e.drawn(s,True):
            v=T.verdict(e, T.raising(ValueError("x"*2000)), s, True); assert len(v.sentence)<1100
    print(e.id,"fine", e.title)
